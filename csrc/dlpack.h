// The part of DLPack's C exchange interface (DLPack 1.2 and later) that reads a tensor's address, type and layout from
// its Python object without a Python call. Declared here because only this binary layout is needed.
#pragma once

#include <cstdint>

namespace signadam::dlpack {

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;

  void* address() const { return static_cast<unsigned char*>(data) + byte_offset; }
};

struct ManagedTensor {
  uint32_t major, minor;
  void* context;
  void (*deleter)(ManagedTensor* self);
};

struct ExchangeHeader {
  uint32_t major, minor;
  ExchangeHeader* previous;
};

struct ExchangeApi {
  ExchangeHeader header;
  void* managed_tensor_allocator;
  int (*managed_tensor_from_py_object_no_sync)(void* object, ManagedTensor** out);
  void* managed_tensor_to_py_object_no_sync;
  // Fills in a view that lives as long as the object; nonzero with a Python error set on failure.
  int (*tensor_from_py_object_no_sync)(void* object, Tensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};

constexpr uint32_t major_version = 1;

}  // namespace signadam::dlpack
