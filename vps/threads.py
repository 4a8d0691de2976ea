"""How torch's idle threads wait on a CPU: asleep, from which it takes 50 us to wake them, or
spinning, which is OpenMP's way unless the environment says otherwise.
"""

import os

ASLEEP = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
