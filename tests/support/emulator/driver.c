// Stands in for libcuda.so.1: every call succeeds, launches are written down. For tests of the host's side of them.
#include <stdint.h>
#include <string.h>

typedef struct {
  unsigned blocks[3], threads[3], shared_bytes;
  void* stream;
} Config;  // as CUlaunchConfig begins

typedef struct {
  Config config;
  void* kernel;
  uint64_t arguments[16];  // the first 8 bytes of each
} Launch;

static Launch latest;
static int num_arguments, num_launches, num_libraries, allowed_shared_bytes;

// What a test asks.
void stand_in_expect(int arguments) { num_arguments = arguments; }
const Launch* stand_in_latest(void) { return &latest; }
int stand_in_num_launches(void) { return num_launches; }
int stand_in_num_libraries(void) { return num_libraries; }
int stand_in_allowed_shared_bytes(void) { return allowed_shared_bytes; }

static int succeed(void) { return 0; }
static int driver_version(int* version) { return *version = 13000, 0; }
static int device_count(int* count) { return *count = 1, 0; }
static int get_device(int* device) { return *device = 0, 0; }
static int get_attribute(int* value) { return *value = 9, 0; }
static int get_handle(void** handle) { return *handle = (void*)0x1000, 0; }

static int load_library(void** library) { return *library = (void*)(0x2000l + ++num_libraries), 0; }
static int get_kernel(void** kernel, void* library) { return *kernel = (void*)((intptr_t)library + 0x1000), 0; }
static int set_attribute(int attribute, int value) {
  if (attribute == 8) allowed_shared_bytes = value;
  return 0;
}

static int launch(const Config* config, void* kernel, void** arguments) {
  ++num_launches;
  latest.config = *config;
  latest.kernel = kernel;
  for (int i = 0; i < num_arguments; ++i) memcpy(&latest.arguments[i], arguments[i], 8);
  return 0;
}

static const struct {
  const char* name;
  void* function;
} kFunctions[] = {
    {"cuDriverGetVersion", (void*)driver_version}, {"cuDeviceGetCount", (void*)device_count},
    {"cuDeviceGet", (void*)get_device},            {"cuCtxGetDevice", (void*)get_device},
    {"cuDeviceGetAttribute", (void*)get_attribute}, {"cuCtxGetCurrent", (void*)get_handle},
    {"cuDevicePrimaryCtxRetain", (void*)get_handle}, {"cuLibraryLoadData", (void*)load_library},
    {"cuLibraryGetKernel", (void*)get_kernel},     {"cuKernelSetAttribute", (void*)set_attribute},
    {"cuLaunchKernelEx", (void*)launch},
};

int cuGetProcAddress_v2(const char* name, void** function) {
  *function = (void*)succeed;
  for (unsigned i = 0; i < sizeof kFunctions / sizeof *kFunctions; ++i)
    if (strcmp(name, kFunctions[i].name) == 0) *function = kFunctions[i].function;
  return 0;
}
int cuGetProcAddress(const char* name, void** function) { return cuGetProcAddress_v2(name, function); }
