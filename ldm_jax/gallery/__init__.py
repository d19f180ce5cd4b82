"""Every task on a model trained on `shapes`: pictures, the commands that make such, and figures by a rule-based reader.

    python -m ldm_jax.gallery --workdir runs/demo/model --out docs/gallery

It writes one PNG a task into the folder and the page beside it (`docs/gallery.md`). Tasks that begin with a picture are
given real ones of the validation split, so that what they keep and change is known.
"""
