"""Which devices each of several runs on one host takes."""

from collections.abc import Sequence

from qkjax import errors

_TPU_PORT = 8476


def places(jobs: int | None, devices: Sequence[str]) -> list[dict[str, str]]:
    """Environment variables of each place that runs may take side by side.

    Args:
        jobs: how many; None: one a device, or one.
        devices: indices that CUDA_VISIBLE_DEVICES and TPU_VISIBLE_CHIPS take; () leaves all
            devices to every run. Several jobs on one device share its memory evenly.
    Raises:
        UsageError: more devices than jobs.
    """
    jobs = jobs or max(1, len(devices))
    if len(devices) > jobs:
        raise errors.UsageError(
            f"--devices: {len(devices)} devices for --jobs={jobs}, so some would idle. "
            "Give as many jobs as devices, or more."
        )
    if not devices:
        return [{} for _ in range(jobs)]
    share = -(-jobs // len(devices))
    found = []
    for number in range(jobs):
        device, port = devices[number % len(devices)], _TPU_PORT + number
        variables = {
            "CUDA_VISIBLE_DEVICES": device,
            "TPU_VISIBLE_CHIPS": device,
            "TPU_PROCESS_BOUNDS": "1,1,1",
            "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
            "TPU_PROCESS_ADDRESSES": f"localhost:{port}",
            "TPU_PROCESS_PORT": str(port),
            "CLOUD_TPU_TASK_ID": "0",
        }
        if share > 1:
            variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / share:.2f}"
        found.append(variables)
    return found
