"""What is in a snapshot, for people: bytes by kind (`contents`), the working set as a picture (`picture`)."""
