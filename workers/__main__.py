"""`python -P -m workers`: one backend in a process of its own."""

from workers.cli import main

main()
