"""``python -m shaped_attn`` is the command ``shaped-attn``."""

from .commands import main

if __name__ == "__main__":
    main()
