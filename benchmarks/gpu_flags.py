"""Flags of XLA that `gpu.py --flags` tries beside what XLA does by itself; the pictures of each have a row.

By itself, by the compile options that JAX 0.10.2 and 0.11.2 write (XLA_FLAGS=--xla_dump_to=DIR): command buffers of all
kinds but loops and collectives, from 5 operations on; and by XLA's gpu_layout_assignment.cc channels last, on Hopper
and later in every float type but float64, on Volta and later in float16 and bfloat16.
"""

FLAGS = {  # name of the job: what its process gets
    "pictures, loops in command buffers": "--xla_gpu_enable_command_buffer=+WHILE",
    "pictures, no command buffers": "--xla_gpu_enable_command_buffer=",
    "pictures, channels first": "--xla_gpu_force_conv_nchw=true",
}
