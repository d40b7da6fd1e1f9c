"""Code that the scripts share. This folder may import all other folders."""
