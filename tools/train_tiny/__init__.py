"""Train the embedded model: a VAE, a video U-Net and a text encoder on the shape world, and write them to a folder.

`train_vae`, `train_unet` and `export` are the commands; the README says what each costs.
"""
