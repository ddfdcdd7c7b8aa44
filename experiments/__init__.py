"""The experiments that produced the numbers of this repository; README.md lists the commands."""
