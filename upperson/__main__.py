"""``python -m upperson``, as torchrun and accelerate launch start the program."""

from upperson.program import main

main()
