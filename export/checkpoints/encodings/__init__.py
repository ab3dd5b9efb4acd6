"""How checkpoints store quantized matrices: small numbers with scales, read as they are or as the floats they mean."""
