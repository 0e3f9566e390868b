"""The train step compiled for TPU slices that are not here, and what the compiler says of its memory."""
