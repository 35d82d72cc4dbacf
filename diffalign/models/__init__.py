"""Diffusion models behind one interface, `Denoiser`; one file a family."""
