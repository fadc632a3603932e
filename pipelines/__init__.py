"""The diffusers face of latent-tiles: pipelines that are their host, and the envelope round one call of it."""
