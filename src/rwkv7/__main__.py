"""`python -m rwkv7` is the command `rwkv7`."""

from rwkv7.cli import main

if __name__ == "__main__":
    main()
