"""The program, also as `python -m dicomcast`."""

import gc


def main() -> None:
    """Run a verb. What is imported is no garbage: not to look for any saves a sixth of the start."""
    gc.disable()
    from dicomcast import cli

    gc.freeze()
    gc.enable()
    cli.main()


if __name__ == "__main__":
    main()
