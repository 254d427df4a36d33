"""The methods, one file each: frozen dataclasses of settings with pure functions, which one loop trains.

A method has

    split(sd, key)                  -> (trained, frozen)   trained: copies; what optimizer and checkpoint see
    join(frozen, trained, key=None) -> sd                  to train and to sample; key: where training itself is random

so that join after split gives an sd that computes as before, and may have

    loss(frozen, trained, batch, key, step, axis=None) -> (scalar, metrics)   in place of the diffusion loss
    look(frozen, trained, pixels)   -> frozen              before the first step of a run on one picture [H W 3]
    finish(frozen, trained, data)   -> (frozen, trained)   after the last step
    pictures                                               True where batches must hold pixels, not moments
    whole_batch                                            True where the loss needs all rows at once: no accumulation

Parts of a Chain lose their own loss.  A new method also goes into METHODS in training/export.py, the table of what a
run's config.json may name, and into training/results.py where it is written as something else than a model folder.
"""
