"""The GFT loss inside the libraries people train with; import the one you use, as `gft_kernels.model.patch`."""
