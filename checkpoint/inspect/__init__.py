"""Show a snapshot to people: its bytes by kind (`contents`), its working set as a picture (`picture`)."""
