"""`python -m sdtrain` is `sdtrain`."""

from sdtrain.cli import main

if __name__ == "__main__":
    main()
