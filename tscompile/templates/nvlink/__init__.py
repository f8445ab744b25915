"""Fused ops over NVLink (executor "nvlink"). Importing `registered` registers the templates and needs TileLang."""
