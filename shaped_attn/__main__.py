"""``python -m shaped_attn`` is the command ``shaped-attn``."""

from .cli import main

if __name__ == "__main__":
    main()
