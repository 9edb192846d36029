"""``python -m upperson``, the form in which torchrun and accelerate launch start the program."""

from upperson.cli import main

main()
