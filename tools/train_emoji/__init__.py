"""Train the emoji world's model: a VAE, a video U-Net and a text encoder, by the parts of `train_tiny`.

`train_vae`, `train_unet`, `card` (the latter on a lent card), `train_detector` and `export` are the commands; `weights`
reads and writes what training goes on from. The README says what each costs.
"""
