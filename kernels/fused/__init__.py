"""The same operations in Triton, for a GPU. Callers import a module here when it is to run, and Triton with it."""
