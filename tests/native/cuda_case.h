// The file of one launch: 16 numbers, then tables, each as its size in bytes and its bytes. Every table is in memory of
// exactly its size, so that AddressSanitizer sees the first byte beyond. The last one read is what is written.
#pragma once
#include <cstdio>
#include <cstdlib>

struct Case {
    long long numbers[16], bytes[16];
    explicit Case(const char* path) : file(std::fopen(path, "rb")) { read(numbers, sizeof numbers); }
    template <typename T> T* table() {
        read(&bytes[count], sizeof bytes[count]);
        const long long size = bytes[count++];
        if (!size) return nullptr;
        T* found = (T*)std::malloc(size);
        read(found, size);
        return found;
    }
    void write(const char* path, const void* from) const {
        std::FILE* to = std::fopen(path, "wb");
        if (std::fwrite(from, 1, bytes[count - 1], to) != (size_t)bytes[count - 1] || std::fclose(to)) std::exit(2);
    }

  private:
    void read(void* to, size_t bytes) {
        if (std::fread(to, 1, bytes, file) != bytes) std::exit(2);
    }
    std::FILE* file;
    int count = 0;
};
