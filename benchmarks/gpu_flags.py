"""XLA flags that `gpu.py --flags` compares with XLA's defaults; each flag gets its own rows of pictures.

XLA's defaults:
Command buffers of all kinds except loops and collectives, from 5 operations on.  Source: the compile options that JAX
0.10.2 and 0.11.2 write with XLA_FLAGS=--xla_dump_to=DIR.
Channels last: on Hopper and later in every float type except float64, on Volta and later in float16 and bfloat16.
Source: XLA's gpu_layout_assignment.cc.
Autotuning at level 4: every candidate for a product or convolution runs several times and its result is checked.  Level
1 runs each once, level 0 none.  The cost is compile time, so these rows say how long it took.  Source: XLA's --help.
"""

FLAGS = {  # name of the job: XLA_FLAGS of its process
    "pictures, loops in command buffers": "--xla_gpu_enable_command_buffer=+WHILE",
    "pictures, no command buffers": "--xla_gpu_enable_command_buffer=",
    "pictures, channels first": "--xla_gpu_force_conv_nchw=true",
    "pictures, autotuning once": "--xla_gpu_autotune_level=1",
    "pictures, no autotuning": "--xla_gpu_autotune_level=0",
}
