// Runs what host_sum.h and sum_push.h define.

struct Sum { int ranks, ctas, tiles, m, n, columns, inner, share, epoch; float scale; };

// The registers of a lane for a tile at (row, col) of a product [m, n], as wgmma leaves them; zeros beyond its edges.
template <int NF> static void load(float *acc, const Sum &s, const float *product, int row, int col) {
  const int warp = TSK_THREAD >> 5, lane = threadIdx.x & 31;
  for (int i = 0; i < NF; ++i) {
    const int r = row + warp * 16 + lane / 4 + 8 * (i / 2 % 2), c = col + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    acc[i] = r < s.m && c < s.n ? product[(int64_t)r * s.n + c] : 0;
  }
}

template <int NF, int FORM>
static void run(const Sum &s, const int *table, void **contexts, const float **products, void **outs) {
  std::vector<std::thread> threads;
  std::vector<std::atomic<int>> claims(s.ranks);
  for (int rank = 0; rank < s.ranks; ++rank)
    for (int cta = 0; cta < s.ctas; ++cta) {
      auto meeting = std::make_shared<std::barrier<>>(256);
      auto claimed = std::make_shared<int>(0);
      for (int w = 0; w < 8; ++w) {
        auto shared = std::make_shared<Warp>();
        for (int lane = 0; lane < 32; ++lane)
          threads.emplace_back([=, &s, &claims] {
            threadIdx.x = 128 + w * 32 + lane;
            warp = shared.get();
            float acc[NF];
            while (true) {
              if (threadIdx.x == 128) *claimed = claims[rank]++;
              meeting->arrive_and_wait();
              const int tile = *claimed;
              meeting->arrive_and_wait();
              if (tile >= s.tiles) return;
              const int *at = table + tile * 8;
              load<NF>(acc, s, products[rank], at[0], at[1]);
              tsk_exchange<NF, TSK_BF16, FORM>(acc, contexts[rank], outs[rank], at[0], at[1], at[2], at[4], at[7], s.columns, s.inner,
                                               s.share, s.n, s.scale, s.epoch, 1);
            }
          });
      }
    }
  for (auto &thread : threads) thread.join();
}

extern "C" void run_sum(int form, const Sum *s, const int *table, void **contexts, const float **products, void **outs) {
  if (form == TSK_SCATTER) run<32, TSK_SCATTER>(*s, table, contexts, products, outs);
  if (form == TSK_TWO_SHOT) run<32, TSK_TWO_SHOT>(*s, table, contexts, products, outs);
  if (form == TSK_ONE_SHOT) run<32, TSK_ONE_SHOT>(*s, table, contexts, products, outs);
}
