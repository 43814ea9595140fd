// A network for test_device.py, whose every operation is rounded once, so that it has the same bits anywhere: 0.7 y - (0.4 x) level.

extern "C" __global__ void arithmetic(const float* x, const float* y, const float* level, float* out, unsigned pixels) {
    const unsigned pixel = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned at = blockIdx.y * pixels + pixel;
    if (pixel < pixels) out[at] = 0.7f * y[at] - 0.4f * x[at] * level[blockIdx.y];
}

// The same in two: what depends on x alone, kept twice so that it is not of a picture's size, and the rest, which reads the second.

extern "C" __global__ void known(const float* x, float* out, unsigned pixels) {
    const unsigned pixel = blockIdx.x * blockDim.x + threadIdx.x;
    if (pixel < pixels) out[pixel] = out[pixels + pixel] = 0.4f * x[pixel];
}

extern "C" __global__ void rest(const float* known, const float* y, const float* level, float* out, unsigned pixels) {
    const unsigned pixel = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned at = blockIdx.y * pixels + pixel;
    if (pixel < pixels) out[at] = 0.7f * y[at] - known[at + (blockIdx.y + 1) * pixels] * level[blockIdx.y];
}
