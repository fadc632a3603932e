"""How the reference model is trained: photographs in, a stock diffusers model folder out.

Stages, one command each: `training.vae`, `.latents`, `.unet`, `.samples`, `.decoder`, `.export`; see README.md.
"""
