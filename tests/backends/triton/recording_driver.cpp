// A libcuda.so.1 that launches nothing and writes down what it is asked for: every byte of every parameter, whose sizes
// it reads off the cubin. A tensor map holds all arguments of its encoding, the address last.
#include <cuda.h>
#include <elf.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

struct Kernel {
  std::string name;
  std::vector<unsigned> sizes;
};

std::map<std::string, Kernel*> kernels;
std::mutex mutex;  // of the records: several threads launch
std::vector<std::string> records;
CUresult next_error = CUDA_SUCCESS;
std::atomic<int> contexts = 0;
thread_local CUcontext context = nullptr;
constexpr size_t kAddress = sizeof(CUtensorMap) - 8;  // in a tensor map

// Sizes of the parameters of each kernel in an ELF file: attribute 0x17 of its section .nv.info.<name>.
void load(const unsigned char* data) {
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(data);
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(data + header->e_shoff);
  const char* names = reinterpret_cast<const char*>(data) + sections[header->e_shstrndx].sh_offset;
  const std::string prefix = ".nv.info.";
  for (int i = 0; i < header->e_shnum; ++i) {
    const std::string section = names + sections[i].sh_name;
    if (section.rfind(prefix, 0) != 0) continue;
    auto* kernel = new Kernel{section.substr(prefix.size()), {}};
    const unsigned char* at = data + sections[i].sh_offset;
    const unsigned char* end = at + sections[i].sh_size;
    while (at < end) {
      const bool sized = at[0] == 4;
      unsigned short size, ordinal;
      unsigned flags;
      std::memcpy(&size, at + 2, 2);
      if (sized && at[1] == 0x17) {
        std::memcpy(&ordinal, at + 8, 2);
        std::memcpy(&flags, at + 12, 4);
        if (kernel->sizes.size() <= ordinal) kernel->sizes.resize(ordinal + 1);
        kernel->sizes[ordinal] = flags >> 18;
      }
      at += sized ? 4 + size : 4;
    }
    kernels[kernel->name] = kernel;
  }
}

std::string hex(const void* data, size_t size) {
  std::string text;
  char digits[3];
  for (size_t i = 0; i < size; ++i) {
    std::snprintf(digits, sizeof digits, "%02x", static_cast<const unsigned char*>(data)[i]);
    text += digits;
  }
  return text;
}

}  // namespace

extern "C" {

int recorded_count() { return static_cast<int>(records.size()); }
const char* recorded(int i) { return records[i].c_str(); }
void forget() { records.clear(); }
void fail_next(int code) { next_error = static_cast<CUresult>(code); }
int contexts_made() { return contexts; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  if (next_error != CUDA_SUCCESS) {
    const CUresult error = next_error;
    next_error = CUDA_SUCCESS;
    return error;
  }
  const auto* kernel = reinterpret_cast<const Kernel*>(function);
  char head[256];
  std::snprintf(head, sizeof head, "%s %u,%u,%u %u,%u,%u %u %p %d", kernel->name.c_str(), config->gridDimX,
                config->gridDimY, config->gridDimZ, config->blockDimX, config->blockDimY, config->blockDimZ,
                config->sharedMemBytes, static_cast<void*>(config->hStream), extra != nullptr);
  std::string text = std::string(head) + " attributes:";
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute& attribute = config->attrs[i];
    text += std::to_string(static_cast<int>(attribute.id)) + "=" + hex(&attribute.value, 4) + ",";
  }
  text += " parameters:";
  for (size_t i = 0; i < kernel->sizes.size(); ++i) text += hex(parameters[i], kernel->sizes[i]) + ",";
  const std::lock_guard<std::mutex> lock(mutex);
  records.push_back(text);
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  std::memset(map, 0xff, sizeof *map);  // Triton clears a bit, for some drivers
  auto* at = reinterpret_cast<unsigned char*>(map);
  std::memcpy(at + kAddress, &address, 8);
  const int rest[] = {type, static_cast<int>(rank), interleave, swizzle, promotion, fill};
  for (int i = 0; i < 6; ++i) at[16 + i] = static_cast<unsigned char>(rest[i]);
  std::memcpy(at + 24, dims, 8 * rank);
  std::memcpy(at + 40, strides, 8 * (rank - 1));
  std::memcpy(at + 48, box, 4 * rank);
  std::memcpy(at + 56, steps, 4 * rank);
  return rank == 2 ? CUDA_SUCCESS : CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuTensorMapReplaceAddress(CUtensorMap* map, void* address) {
  std::memcpy(reinterpret_cast<unsigned char*>(map) + kAddress, &address, 8);
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* data) {
  load(static_cast<const unsigned char*>(data));
  *module = reinterpret_cast<CUmodule>(&kernels);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  *function = reinterpret_cast<CUfunction>(kernels.at(name));
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute, CUdevice) { return *value = 232448, CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr address) {
  std::memcpy(value, &address, sizeof address);
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* current) { return *current = context, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext current) { return context = current, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* made, CUdevice device) {
  ++contexts;
  *made = reinterpret_cast<CUcontext>(static_cast<size_t>(device) + 4096);
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult code, const char** text) {
  static thread_local char buffer[32];
  std::snprintf(buffer, sizeof buffer, "error %d", static_cast<int>(code));
  return *text = buffer, CUDA_SUCCESS;
}

}  // extern "C"
