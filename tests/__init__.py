"""The proof that the house keeps its promises, one drawer per kind of proof."""
