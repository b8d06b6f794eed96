// Hands out a worker's scratch memory. Built twice: once from null to learn the size.
struct Arena {
  float* at;
  int64_t used;
  float* floats(int64_t n) {
    float* p = at == nullptr ? nullptr : at + used;
    used += round_up(n, 16);
    return p;
  }
  template <class T>
  T* array(int64_t n) {
    return reinterpret_cast<T*>(floats((n * static_cast<int64_t>(sizeof(T)) + 3) / 4));
  }
};
