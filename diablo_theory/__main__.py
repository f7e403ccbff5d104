"""``python -m diablo_theory``."""

from diablo_theory.cli import main

main()
