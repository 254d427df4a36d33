"""Makes the pictures of a list.  Rerun the command after any interruption: it makes the missing pictures.

    python sample/batch.py jobs.jsonl --out pictures
    python sample/batch.py jobs.csv --out pictures --model FOLDER --batch 8 --steps 30
    python sample/batch.py matrix.jsonl --out plots --plot guidance,seed          # a sheet: guidance across, seeds down

A row of the list (JSONL, CSV, parquet) is one picture.  Its fields are the settings below, with _ for -: prompt,
negative_prompt, image ...; seed defaults to the row's number.  Two more fields are name and task; without a task, the
fields mask, image and control_image choose it.  "adapter" is "<lora:NAME:0.8>", as in prompts.  Files are in the list's
own folder.  A field with a list of values makes a grid.  Flags and --set FIELD=VALUE fill fields that rows omit.
Each picture is NAME.png with its settings inside; NAME.json is written last.  Failed rows are in errors.jsonl.

The devices of a machine share each batch.  Several machines with a shared folder can split a list: start the command
with a launcher (Slurm, TPU slice, mpirun, JAX_COORDINATOR_ADDRESS ...), or on each machine with --part 0/4, 1/4 ...
"""

import sys

from sdjax.runtime import watch

if __name__ == "__main__":
    watch.split()
    from sdjax.service.batch import main  # after the split: it imports JAX, which has threads

    sys.exit(main(__doc__))
