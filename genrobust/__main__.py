"The `genrobust` command, as `python -m genrobust`."
import sys

from .cli import main

if __name__=='__main__':
    sys.exit(main())
