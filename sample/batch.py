"""Makes the pictures of a list, resumably: started again, it makes what is missing.

    python sample/batch.py jobs.jsonl --out pictures
    python sample/batch.py jobs.csv --out pictures --model FOLDER --batch 8 --steps 30
    python sample/batch.py matrix.jsonl --out plots --plot guidance,seed          # a sheet: guidance across, seeds down

A row of the list (JSONL, CSV, parquet) is a picture: any of the settings below under their names with _ for -, such as
prompt, negative_prompt, seed (else the row's number), image; files lie in the list's own folder.  Also name, and task,
else found by what a row names: mask, image, control_image.  "adapter" is "<lora:NAME:0.8>", as in prompts.
A field that is a list is a matrix; flags are for rows that leave a field out, and --set FIELD=VALUE is that too.
Each picture gets NAME.png with its settings in it, and last NAME.json; rows that cannot be made are in errors.jsonl.

A machine's devices share each batch.  To divide a list over machines, start the same line on each with --distributed,
which joins the launch (SLURM, TPU pod, JAX_COORDINATOR_ADDRESS), or give them --part 0/4, 1/4, ...; the folder is one.
"""

import sys

from sdjax.service.batch import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
