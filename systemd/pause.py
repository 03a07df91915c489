"""Growing pauses for a service whose set-up is at fault: liveapi.service runs this after each end.

Restart= by itself would try a faulty set-up each second for ever, and RestartSteps= needs systemd
254. So a mistake in the set-up is followed by a pause of 2, 4, 8, 16, then 30 seconds; any other
end by none. While it lasts, `systemctl status` shows the last line before it, which says what to
mend. When something changes among the keys the pause is over at once.
"""

import os
import sys
import time
from pathlib import Path

KEYS = Path("/etc/liveapi/keys")
MISTAKES = Path("/run/liveapi-mistakes/count")  # a byte for each; systemd keeps it over a restart
# The receiver ends with status 2; systemd has 200 and up for what keeps it from starting the
# receiver, such as a certificate that is not there (systemd.exec(5)).
STATUSES = {"2", *map(str, range(200, 256))}
LONGEST = 30.0  # less than TimeoutStopSec=: that ends this, too


def state_of_keys() -> list[tuple[str, int]]:
    if not KEYS.is_dir():
        return []
    return sorted((str(path), path.stat().st_ctime_ns) for path in [KEYS, *KEYS.iterdir()])


if os.environ.get("EXIT_STATUS") not in STATUSES:
    MISTAKES.unlink(missing_ok=True)
    sys.exit()
with open(MISTAKES, "ab") as file:
    file.write(b"x")
    pause = min(2.0 ** file.tell(), LONGEST)
print(f"a mistake in the set-up: trying again in {pause:.0f} seconds", flush=True)
found, end = state_of_keys(), time.monotonic() + pause
while time.monotonic() < end:
    time.sleep(0.5)
    if state_of_keys() != found:
        MISTAKES.unlink(missing_ok=True)
        break
