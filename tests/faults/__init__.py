"""What can go wrong, made to go wrong: kills, full disks, damaged files, hostile input."""
