// wgmma: products that go on while the threads of a warpgroup do other things.
#pragma once

namespace emulated {

void forget_products();           // before a cluster
void fail_if_products_are_left();  // of the current thread, which has ended

}  // namespace emulated
