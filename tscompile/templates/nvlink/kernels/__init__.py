"""TileLang programs of the fused ops. Their annotations are tensor shapes that TileLang evaluates, not types."""
