"""Stops every running job of the local Ray head and waits: the head pod's preStop hook.

Deleting a RayCluster sends the driver no signal; this gives it one (SIGTERM by way of the Jobs API) and the time to
write its last checkpoint. `kuberay.render` puts the text of this file into the ConfigMap, so it uses Ray and the
standard library only.

    python stop_jobs.py http://127.0.0.1:8265 75
"""

from __future__ import annotations

import os
import sys
import time


def stop_all_jobs(address: str, deadline_s: float) -> int:
    """Ask every unfinished job to stop and wait for the end of all; the number that did not end in time."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    deadline = time.monotonic() + deadline_s
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # the operator sets RAY_ADDRESS, which would win over the argument
    client = JobSubmissionClient(address)
    unfinished = {JobStatus.PENDING, JobStatus.RUNNING}
    waiting = [job.submission_id for job in client.list_jobs() if job.status in unfinished and job.submission_id]
    for submission_id in waiting:
        client.stop_job(submission_id)
    while waiting and time.monotonic() < deadline:
        time.sleep(0.5)
        waiting = [one for one in waiting if client.get_job_status(one) in unfinished]
    return len(waiting)


if __name__ == "__main__":
    left = stop_all_jobs(sys.argv[1], float(sys.argv[2]))
    print(f"{left} job(s) still running" if left else "all jobs ended", file=sys.stderr)
    sys.exit(1 if left else 0)
