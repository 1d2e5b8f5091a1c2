/* What torch itself asks of NVML when it has memory in segments that grow, and when one is full;
   tests/fake_nvml has what the job asks. */

enum { OK, NOT_SUPPORTED = 3 };
static int device;

int nvmlInit_v2(void) { return OK; }

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, int **handle) {
    (void)bus;
    *handle = &device;
    return OK;
}

int nvmlDeviceGetComputeRunningProcesses(void *of, unsigned *count, void *processes) {
    (void)of, (void)processes;
    *count = 0;
    return OK;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    *version = 13000;
    return OK;
}

int nvmlDeviceGetGpuFabricInfoV(void) { return OK; } /* and leaves the zeros: no fabric */
int nvmlDeviceGetNvLinkRemoteDeviceType(void) { return NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void) { return NOT_SUPPORTED; }
