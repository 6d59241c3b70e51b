"""Device meshes, shardings and processes."""
