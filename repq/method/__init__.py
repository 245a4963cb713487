"The method: kernels, statistics, quantizers, blocks, the quantized layer"
