"""What programs of this folder share; no programs themselves."""
