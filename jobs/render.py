"""Runs `hv-batch run` as a Ray job, with the same arguments.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/render.py --config C --manifest M --output O
"""

import sys

from hv_batch.__main__ import main

if __name__ == "__main__":
    sys.argv.insert(1, "run")
    main()
