"""Load and call the compiled library, and turn tensors of other packages into its own."""
