"""Runs `hv-batch resume` as a Ray job, with the same arguments. It needs nothing but the output root.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/resume.py s3://bucket/run-1
"""

import sys

from hv_batch.__main__ import main

if __name__ == "__main__":
    sys.argv.insert(1, "resume")
    main()
