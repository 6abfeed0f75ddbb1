/* The three products that libmlx asks for, under their plain names, handed on to scipy-openblas32, which exports them
   with a prefix. Loaded with RTLD_GLOBAL before libmlx, it is what libmlx's lazily bound calls find first. */

typedef int blasint;

#define REAL_GEMM(T, name)                                                                                          \
  void scipy_cblas_##name(int, int, int, blasint, blasint, blasint, T, const T *, blasint, const T *, blasint, T,    \
                          T *, blasint);                                                                             \
  __attribute__((visibility("default"))) void cblas_##name(int order, int ta, int tb, blasint m, blasint n,          \
                                                           blasint k, T alpha, const T *a, blasint lda, const T *b,  \
                                                           blasint ldb, T beta, T *c, blasint ldc) {                 \
    scipy_cblas_##name(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);                                 \
  }

REAL_GEMM(float, sgemm)
REAL_GEMM(double, dgemm)

void scipy_cblas_cgemm(int, int, int, blasint, blasint, blasint, const void *, const void *, blasint, const void *,
                       blasint, const void *, void *, blasint);
__attribute__((visibility("default"))) void cblas_cgemm(int order, int ta, int tb, blasint m, blasint n, blasint k,
                                                        const void *alpha, const void *a, blasint lda, const void *b,
                                                        blasint ldb, const void *beta, void *c, blasint ldc) {
  scipy_cblas_cgemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
