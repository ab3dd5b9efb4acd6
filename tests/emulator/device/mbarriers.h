// mbarriers in shared memory, and the copies that count their bytes at one.
#pragma once

namespace emulated {

void forget_mbarriers();         // before a cluster
bool had_mbarriers();            // the cluster before
void fail_if_copies_are_left(unsigned block);  // to or from a block whose threads have all ended
void fail_if_threads_wait_for_copies();

}  // namespace emulated
