"""How torch's idle threads wait on a CPU: spinning, as OpenMP has it, or asleep, where each
parallel call wakes them first (50 us on two cores of an EPYC).
"""

import os

ASLEEP = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
