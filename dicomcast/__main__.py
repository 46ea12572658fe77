"""`python -m dicomcast`."""

from dicomcast.cli import main

main()
